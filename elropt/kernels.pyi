# For type checkers, which do not see that in a checkout the kernels lie beside this folder. Not installed.
from kernels import *  # noqa: F403
