"""Drawing: which OpenGL renders, cameras, and the plane of 2D navigation."""
