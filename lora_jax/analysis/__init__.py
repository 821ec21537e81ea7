"""What adapters learned: subspaces, spectra, and ΔW against W, over stacks of layers."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_jax.analysis.adapters import compare_adapters as compare_adapters
    from lora_jax.analysis.adapters import compare_all as compare_all
    from lora_jax.analysis.angles import SharedDirections as SharedDirections
    from lora_jax.analysis.factors import delta_svd as delta_svd
    from lora_jax.analysis.factors import kernel_svd as kernel_svd
    from lora_jax.analysis.formulas import SVD as SVD
    from lora_jax.analysis.formulas import Amplification as Amplification
    from lora_jax.analysis.formulas import Intruders as Intruders
    from lora_jax.analysis.frames import similarity_frame as similarity_frame
    from lora_jax.analysis.frames import to_frame as to_frame
    from lora_jax.analysis.intrinsic import Dimension as Dimension
    from lora_jax.analysis.intrinsic import intrinsic_dimension as intrinsic_dimension
    from lora_jax.analysis.kernels import adapter_amplification as adapter_amplification
    from lora_jax.analysis.kernels import amplification as amplification
    from lora_jax.analysis.kernels import projected_norm as projected_norm
    from lora_jax.analysis.profiles import profile_adapter as profile_adapter
    from lora_jax.analysis.shared import marginal_similarity as marginal_similarity
    from lora_jax.analysis.shared import remove_directions as remove_directions
    from lora_jax.analysis.shared import shared_directions as shared_directions
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
    from lora_jax.analysis.trained import factors_of as factors_of
else:
    # Adapters in files are analysed without JAX.
    from lora_jax._public import lazy_names

    __getattr__, __dir__, __all__ = lazy_names(
        __name__,
        {
            "adapters": "compare_adapters compare_all",
            "angles": "SharedDirections",
            "factors": "delta_svd kernel_svd",
            "formulas": "SVD Amplification Intruders",
            "frames": "similarity_frame to_frame",
            "intrinsic": "Dimension intrinsic_dimension",
            "kernels": "adapter_amplification amplification projected_norm",
            "profiles": "profile_adapter",
            "shared": "marginal_similarity remove_directions shared_directions",
            "spectra": "energy_rank entropy_rank intruder_dimensions stable_rank",
            "subspaces": "basis_similarity column_basis delta_subspace_similarity "
            "expected_similarity kernel_subspace_similarity sample_similarity subspace_similarity",
            "trained": "factors_of",
        },
    )
