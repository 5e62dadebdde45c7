"""The folder of a run: which process may write it, what it holds, and how a run resumes from it."""
