"""Every setting of a run, in one typed schema."""

from lora_jax.settings.config import make_config as make_config
from lora_jax.settings.fields import BOOKKEEPING as BOOKKEEPING
from lora_jax.settings.fields import IDENTITY as IDENTITY
from lora_jax.settings.fields import LANE as LANE
from lora_jax.settings.fields import Setting as Setting
from lora_jax.settings.schema import SECTIONS as SECTIONS
from lora_jax.settings.schema import SETTINGS as SETTINGS
from lora_jax.settings.schema import DataSettings as DataSettings
from lora_jax.settings.schema import MethodSettings as MethodSettings
from lora_jax.settings.schema import ModelSettings as ModelSettings
from lora_jax.settings.schema import OptimizerSettings as OptimizerSettings
from lora_jax.settings.schema import TrainSettings as TrainSettings
from lora_jax.settings.schema import check as check
from lora_jax.settings.schema import join_method as join_method
from lora_jax.settings.settings import Settings as Settings
from lora_jax.settings.settings import complete as complete
from lora_jax.settings.settings import config_hash as config_hash
from lora_jax.settings.settings import flat_config as flat_config
from lora_jax.settings.settings import hashed_settings as hashed_settings
from lora_jax.settings.settings import plain_config as plain_config
