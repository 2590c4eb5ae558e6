"""nbdev_test, with its options, but for the pictures: its shell draws each figure, mostly twice and at twice its size, shows it to nobody,
and goes on where drawing fails. What cells compute, and the figures that they make, are what nbdev_test sees.
"""
import gc
import sys

from execnb.shell import CaptureShell
from matplotlib.figure import Figure
from nbdev import test

sys.modules['rfc3987_syntax'] = None    # a grammar that nbconvert's jsonschema builds where JupyterLab brought it, for longer than torch is loaded
gc.set_threshold(100_000, 20, 20)      # garbage is collected seldom: each time, what torch brought is looked through


class Shell(CaptureShell):
    "A shell that does not turn figures into PNG."

    def __init__(self, *given, **more):
        super().__init__(*given, **more)
        self.display_formatter.formatters['image/png'].pop(Figure, None)


test.CaptureShell = Shell

if __name__ == '__main__':
    test.nbdev_test()
