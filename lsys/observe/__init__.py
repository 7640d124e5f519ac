"""What a run says of itself: FLOPs, metrics, TensorBoard, console."""
