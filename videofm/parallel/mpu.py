"""The groups by the names that DeepSpeed asks for (`deepspeed.initialize(mpu=...)`)."""

from __future__ import annotations

from megatron.core import parallel_state
from torch.distributed import ProcessGroup


class DeepSpeedMpu:
    """DeepSpeed's "model parallel unit" over megatron-core. Its "data parallel" is our `data x context`: the ranks that
    hold the same weights and average gradients, over which ZeRO shards."""

    def get_model_parallel_rank(self) -> int:
        """Rank along the tensor axis."""
        return int(parallel_state.get_tensor_model_parallel_rank())

    def get_model_parallel_world_size(self) -> int:
        """Degree of the tensor axis."""
        return int(parallel_state.get_tensor_model_parallel_world_size())

    def get_model_parallel_group(self) -> ProcessGroup:
        """Group of the tensor axis."""
        return parallel_state.get_tensor_model_parallel_group()

    def get_data_parallel_rank(self) -> int:
        """Rank among those that average gradients."""
        return int(parallel_state.get_data_parallel_rank(with_context_parallel=True))

    def get_data_parallel_world_size(self) -> int:
        """Number of ranks that average gradients."""
        return int(parallel_state.get_data_parallel_world_size(with_context_parallel=True))

    def get_data_parallel_group(self) -> ProcessGroup:
        """Ranks that average gradients."""
        return parallel_state.get_data_parallel_group(with_context_parallel=True)
