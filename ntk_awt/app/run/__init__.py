"""One configuration in one folder: its readers, its one writer, its records and stages."""
