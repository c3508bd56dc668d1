"""Tests of the core; a package, since ``tests/backends`` has files of the same names."""
