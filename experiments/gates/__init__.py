"""Gates of four granularities in one objective."""
