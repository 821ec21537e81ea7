"""Many devices: a mesh, where each array lies on it, and steps compiled ahead for it."""

from lora_jax.parallel.mesh import AXES as AXES
from lora_jax.parallel.mesh import make_mesh as make_mesh
from lora_jax.parallel.mesh import read_mesh as read_mesh
from lora_jax.parallel.placement import Placement as Placement
