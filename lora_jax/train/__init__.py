"""Training: one loop for every method, resumable bit for bit.

Called, the package is its function `train`: `lora_jax.train(config, workdir)`.
"""

from lora_jax._public import call_as, renamed
from lora_jax.train.adapted import Adapted as Adapted
from lora_jax.train.build import make_method as make_method
from lora_jax.train.build import make_model as make_model
from lora_jax.train.compilation import enable_compilation_cache as enable_compilation_cache
from lora_jax.train.evaluate import evaluate as evaluate
from lora_jax.train.evaluate import make_scores as make_scores
from lora_jax.train.loop import Callback as Callback
from lora_jax.train.optimizer import make_optimizer as make_optimizer
from lora_jax.train.optimizer import make_schedule as make_schedule
from lora_jax.train.run import train as train
from lora_jax.train.run import train_cell as train_cell
from lora_jax.train.signals import Interrupted as Interrupted
from lora_jax.train.state import TrainState as TrainState
from lora_jax.train.state import init_state as init_state
from lora_jax.train.step import make_train_step as make_train_step

__getattr__ = renamed(
    __name__, load_adapter=("lora_jax.train.adapted.load_run_adapter", "lora_jax.load_adapter")
)
call_as(__name__, "train")
