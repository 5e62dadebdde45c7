"""Images in folders and in zips of them."""
