"""The engines: NumPy references, and the compiled kernels."""

import os

# Between two calls GNU OpenMP's threads spin, for a millisecond and more, before they sleep. Where other processes
# want the CPUs too, the spinning takes the time slice from the thread that everybody waits for: a training step of
# LeNet-5 took 130 to 190 ms at a load of 8 on 2 CPUs, 23 to 36 ms with 2000 spins (some 50 µs), which still
# bridge the pause between two layers. GNU OpenMP reads the variable once, when it is loaded, so that it is set
# only for that moment; OpenMPs of other makers ignore it.
_SPINS = "GOMP_SPINCOUNT"
if os.environ.keys().isdisjoint((_SPINS, "OMP_WAIT_POLICY")):
    os.environ[_SPINS] = "2000"
    try:
        import fastconv.backends._cpu
    finally:
        del os.environ[_SPINS]
