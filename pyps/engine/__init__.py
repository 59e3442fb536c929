"""llama.cpp, and nothing of ours above it: models, contexts, lock-step generation and the join.

For agents of your own: everything here works on llama.cpp's objects, and knows nothing of prompts, adapters or runs.
"""

from pyps.engine.context import Context, Token
from pyps.engine.find import find_model
from pyps.engine.generate import Generation, generate
from pyps.engine.join import Span, join
from pyps.engine.model import Model
from pyps.engine.sampling import Sampling

__all__ = ["Context", "Generation", "Model", "Sampling", "Span", "Token", "find_model", "generate", "join"]
