"""The names in a run's folder: what training writes and the report reads."""

RECORDS = ("metrics", "steps", "pairs", "timing")  # NAME.jsonl
FOLDERS = ("checkpoints", "tensorboard", "weights", "features")
FILES = (".lock", "run.json", "layers.json", *(f"{name}.jsonl" for name in RECORDS))
REPORT = "report.html"
