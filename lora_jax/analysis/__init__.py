"""What adapters learned: subspaces, spectra, and ΔW against W. Pure JAX, over stacks of layers."""

from lora_jax.analysis.adapters import compare_adapters as compare_adapters
from lora_jax.analysis.adapters import factors_of as factors_of
from lora_jax.analysis.adapters import profile_adapter as profile_adapter
from lora_jax.analysis.factors import SVD as SVD
from lora_jax.analysis.factors import delta_svd as delta_svd
from lora_jax.analysis.factors import kernel_svd as kernel_svd
from lora_jax.analysis.intrinsic import Dimension as Dimension
from lora_jax.analysis.intrinsic import intrinsic_dimension as intrinsic_dimension
from lora_jax.analysis.kernels import Amplification as Amplification
from lora_jax.analysis.kernels import adapter_amplification as adapter_amplification
from lora_jax.analysis.kernels import amplification as amplification
from lora_jax.analysis.kernels import projected_norm as projected_norm
from lora_jax.analysis.spectra import Intruders as Intruders
from lora_jax.analysis.spectra import energy_rank as energy_rank
from lora_jax.analysis.spectra import entropy_rank as entropy_rank
from lora_jax.analysis.spectra import intruder_dimensions as intruder_dimensions
from lora_jax.analysis.spectra import stable_rank as stable_rank
from lora_jax.analysis.subspaces import basis_similarity as basis_similarity
from lora_jax.analysis.subspaces import column_basis as column_basis
from lora_jax.analysis.subspaces import delta_subspace_similarity as delta_subspace_similarity
from lora_jax.analysis.subspaces import expected_similarity as expected_similarity
from lora_jax.analysis.subspaces import kernel_subspace_similarity as kernel_subspace_similarity
from lora_jax.analysis.subspaces import sample_similarity as sample_similarity
from lora_jax.analysis.subspaces import subspace_similarity as subspace_similarity
