"""Files: whole or absent, checked before the work, and every fault in them one clear error."""
