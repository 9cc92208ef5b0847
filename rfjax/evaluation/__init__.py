"""Measures of decoded video that need no network and no weights."""
