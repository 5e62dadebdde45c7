"""Names of the files and folders in a run folder, which training and evaluation write and the report reads."""

from pathlib import Path

from fastcl.errors import shown

RECORDS = ("metrics", "steps", "pairs", "timing")  # NAME.jsonl
FOLDERS = ("checkpoints", "tensorboard", "weights", "features", "profile")
EVALUATION = "evaluation.json"
FILES = (".lock", "run.json", "layers.json", EVALUATION, *(f"{name}.jsonl" for name in RECORDS))
REPORT = "report.html"
SWEEP = "sweep.json"  # in the folder of a sweep


def absent(path: Path) -> str:
    """What to say where a file of a run does not exist, for its folder may be that of a sweep."""
    folder = path.parent
    if (folder / SWEEP).is_file():
        return f"{shown(folder)} is the folder of a sweep; its runs are the folders in {shown(folder / 'cells')}"
    return f"{shown(path)}: no such file; is {shown(folder)} the folder of a run?"
