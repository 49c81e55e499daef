"""Measurement of executables and of the machine; whatever is compared runs interleaved."""
