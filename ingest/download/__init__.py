"""From a publisher's server to a dataset's folder, whole or not at all."""
