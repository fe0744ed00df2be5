"""Where images come from: the hub, folders and Parquet files, each cut into units."""
