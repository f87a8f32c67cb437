"""What options of merging can be; for help texts and the command line, without importing torch."""

METHODS = ("permute", "average", "random", "weights")  # how neurons are matched, of `plan`
ANCHORS = ("first", "middle", "last")  # the layer of a group that the others are aligned to
RECOVERIES = ("refit", "distill")  # quality without training the model; distill can follow refit
INPUTS = ("original", "merged")  # whose stream the first fit of `refit_` sees
WEIGHTS = ("stream", "output", "equal")  # by which `refit_` weighs the errors of its layers
JUDGES = ("loss", "error")  # what local distillation keeps the best step by: of the model, or of the layers' outputs
SMALLEST_SKETCH = 16  # rows
