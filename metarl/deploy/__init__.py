"""The trained agent in use: policy, ONNX, stable-baselines3, recorded episodes."""
