"""The only stateful layer: files, modules, devices."""
