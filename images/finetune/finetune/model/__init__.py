"""The base model, its quantisation, the adapters, and attention over packed sequences."""

import logging
import warnings

# peft imports bitsandbytes, which reports a missing optional kernel; transformers warns of a name that peft still uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
