"""One file per verb of `ffmerge`: HELP, OPTIONS (functions that add arguments to a parser) and run(args, inputs)."""
