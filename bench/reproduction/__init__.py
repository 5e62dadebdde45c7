"""The paper's questions asked of small networks on a CPU: sweeps, a table of their alignments, and what it answers."""
