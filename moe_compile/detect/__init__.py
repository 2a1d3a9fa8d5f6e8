"""Detection: an abstract interpreter that reads an ATen graph and knows what its values mean for routing.

values.py       what a value can mean; sorted_values.py, dense_values.py, sum_values.py build on it
ids.py          which nodes hold expert ids, and what is known of them
shapes.py       sizes that have to be equal
masks.py        rules for masks of one expert or all: one-hot, comparisons, sums
selection.py    rules for nonzero and gathers: who is chosen
rows.py         rules for the expert's body: which ops are row-wise
sorted_rows.py  rules for rows laid out by sorting: grouped and batched forms
sums.py         rules for accumulation: where results go
interpreter.py  walks the graph, applies the rules, tracks mutation and grad mode
facts.py        what the caller knows of the graph
nodes.py        what a node is called, and whose memory its value lies in
"""
