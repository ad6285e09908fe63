"""One configuration in one folder: the folder, its records and the stages that fill it."""
