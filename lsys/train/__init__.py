"""The loop, the engine (Megatron's DDP, optimizer, schedules), the loss."""
