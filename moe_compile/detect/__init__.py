"""Detection: an abstract interpreter that reads an ATen graph and knows what its values mean for routing.

values.py       what a value can mean
selection.py    rules for masks, one-hot, nonzero, gathers: who is chosen
rows.py         rules for the expert's body: which ops are row-wise
sorted_rows.py  rules for rows laid out by sorting: grouped and batched forms
sums.py         rules for accumulation: where results go
interpreter.py  walks the graph, applies the rules, tracks mutation and grad mode
"""
