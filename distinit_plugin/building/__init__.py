"""The parts of ``distinit_plugin.build``, through which they are used."""
