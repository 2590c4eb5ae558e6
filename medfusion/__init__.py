__version__ = "0.1.0"

try:
    import cv2 as _  # noqa: F401  asked first, so that what is missing is said in a sentence
except ImportError as error:
    raise ImportError(f'OpenCV cannot be loaded ({error}). Where a library of the system is missing, take the same module without '
                      'windows: pip uninstall opencv-python; pip install opencv-python-headless') from None
