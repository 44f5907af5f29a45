"""The command line: Hydra's composition, checked names, exit codes and the record of a run."""
