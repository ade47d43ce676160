(uid, props, look) => {
  // circuitsvis' ColoredTokensMulti fixes its colours and keeps the first column's bounds for all
  // columns. It is a function from props to elements, so run it inside a component of our own and
  // give the token row its colours and the shown site's scale. The bounds typed by the reader stay
  // in force as multiples of that scale.
  const isTokens = (child) => Boolean(child && child.props && child.props.tooltips);
  function Sites(given) {
    const tree = CircuitsVis.ColoredTokensMulti(given);
    const children = [].concat(tree.props.children);
    if (!children.some(isTokens)) {
      throw new Error("this version of circuitsvis lays out its token view in another way");
    }
    return {...tree, props: {...tree.props, children: children.map((child) => {
      if (!isTokens(child)) return child;
      const scale = look.scales[child.props.tooltips[0].props.currentValueIndex];
      return {...child, props: {
        ...child.props,
        maxValue: child.props.maxValue * scale,
        minValue: child.props.minValue * scale,
        positiveColor: look.positive,
        negativeColor: look.negative,
      }};
    })}};
  }
  CircuitsVis.render(uid, Sites, props);
}
