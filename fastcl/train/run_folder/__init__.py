"""The folder of a run: who may write it, what it holds, and how a run goes on from it."""
