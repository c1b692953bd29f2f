"""Penstock inside other engines, one file for each host: tables from their layers to our operators.

    transformers   enable(model) swaps the layers of one model in place, disable(model) puts them back
    vllm           a general plug-in: attention backend, norms, activations
    sglang         a plug-in: attention backend
    hpc_ops        the interface of hpc-ops (the module `hpc` that vLLM and SGLang call) over our operators

Importing a file here imports no host. Nothing in Penstock but the command line imports these files.
"""
