"""The schema of the YAML files, how they are read, and the check that collects every error."""
