"""`moe-compile plan`: memory and step time of a model on a number of GPUs, by arithmetic, before there is any hardware.

shapes.py     what a model is made of, from a transformers config or a preset
hardware.py   what GPUs can do, from their data sheets
layouts.py    how ranks may be divided, as build_mesh would
memory.py     what a rank holds
step.py       what a step takes; the experts' part is parallel/costs.py
search.py     every layout, and which is recommended
table.py      as a table
"""
