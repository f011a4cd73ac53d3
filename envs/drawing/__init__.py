"""Off-screen rendering: choice of OpenGL backend, MuJoCo cameras, 2D navigation, MP4 and GIF files."""
