"""File access: outputs are complete or absent and are checked before work starts; every fault gives one clear error."""
