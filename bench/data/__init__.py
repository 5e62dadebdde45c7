"""The benchmark of data loading and view rendering."""
