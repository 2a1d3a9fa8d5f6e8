"""Train unmodified Hugging Face MoE models five ways on this machine and write one HTML report.

data    byte-level text from the Python standard library's own sources
models  the two models (configuration only, random weights) and the five ways to run them
train   one training run: losses, time per step, time to the first step
parity  do the losses of two runs agree?
run     all models and variants in a row, with a callback for progress
record  what a run leaves behind: plain dataclasses that read and write JSON
plots   PNG figures from a record
report  the self-contained index.html, and the terminal summary
"""
