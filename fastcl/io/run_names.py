"""Names of the files and folders in a run folder, which training and evaluation write and the report reads."""

RECORDS = ("metrics", "steps", "pairs", "timing")  # NAME.jsonl
FOLDERS = ("checkpoints", "tensorboard", "weights", "features", "profile")
EVALUATION = "evaluation.json"
FILES = (".lock", "run.json", "layers.json", EVALUATION, *(f"{name}.jsonl" for name in RECORDS))
REPORT = "report.html"
SWEEP = "sweep.json"  # in the folder of a sweep
