"""Loading for inference through transformers: `AutoModelForCausalLM.from_pretrained` just works.

`arm` registers the quantizer; `config` reads what a checkpoint says; nothing here imports
transformers before the user does.
"""

from ar_kernels.hf.arm import arm

__all__ = ["arm"]
