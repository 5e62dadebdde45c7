"""Images in folders, and in zips of folders."""
