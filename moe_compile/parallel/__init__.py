"""Expert parallelism: `moe_compile.build_mesh` and `moe_compile.parallelize`.

api.py          parallelize
mesh.py         the mesh and what fits it
find.py         which parameters are experts', by structure
shards.py       experts' weights as DTensors; the dense meaning of a sharded module
gather.py       uncompiled, or refused: weights are gathered around a forward
fsdp.py         dense parameters under torch's fully_shard; tensor_parallel.py: under its parallelize_module
gradients.py    what makes an ordinary training loop right
clip.py         the norm of gradients on several meshes
state_dicts.py  the model's own names
checkpoint.py   saved and loaded, with the optimizer, on any mesh
folders.py      a folder that is written as a whole or not at all
hf_weights.py   weights read from Hugging Face's files, hf_save.py: written as such
hf_names.py     names and layouts: transformers' own conversions
slots.py        what a rank holds of each named tensor; memory for what is on meta
safetensors_files.py  the files
optim.py        groups for foreach and fused steps; tiled.py: a step in tiles
writer.py       what the strategies share that write a region for many ranks
by_rows.py      those that bring each row's result home; by_sums.py: those that add results where experts are
exchange.py     what the graph of a placed region calls between its collectives
                shared_tokens.py: the same for tokens that ranks share
costs.py        what each strategy costs, and which is the fastest
agree.py        one decision for all ranks
"""
