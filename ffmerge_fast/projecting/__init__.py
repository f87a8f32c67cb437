"""Projected compression (paper B): W_C = P_out · W · P_in + R, trained, then folded to a plain smaller model."""
