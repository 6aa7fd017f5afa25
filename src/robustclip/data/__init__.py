"""Images and words: Tinyworld, the table of roles, and loaders of real data sets."""
