package mojomesh;

/** A model that {@link FlatTrees} cannot hold, or does not score as genmodel does; genmodel scores it then. */
final class NotUnpacked extends Exception {
  NotUnpacked(String reason) {
    super(reason);
  }
}
