"""Events, topics, definitions and bundles that every service of mojomesh shares."""
