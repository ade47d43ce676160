(uid, props, look) => {
  // circuitsvis' AttentionHeads has one scale for all matrices and large names over its thumbnails.
  // It is a function from props to elements, so run it inside a component of our own and give every
  // matrix its own scale.
  function inside(change) {
    const walk = (node) => {
      if (Array.isArray(node)) return node.map(walk);
      if (!node || !node.props) return node;
      const changed = change(node);
      if (changed) return changed;
      if (node.props.children === undefined) return node;
      return {...node, props: {...node.props, children: walk(node.props.children)}};
    };
    return walk;
  }
  let found = 0;
  const selectors = new Map();
  const scaled = inside((node) => {
    const {attention, tokens, style, children} = node.props;
    if (node.type === "h4") return {...node, props: {...node.props, style: {...style, fontSize: 11}}};
    if (node.type === "h3" && /^Head Selector/.test(children)) {
      return {...node, props: {...node.props, children: look.title}};
    }
    if (!attention || !tokens) return null;
    const at = props.attention.indexOf(attention);
    if (at >= 0) {
      found += 1;
      return {...node, props: {...node.props, maxValue: look.scales[at], minValue: -look.scales[at]}};
    }
    const inner = node.type;
    if (!selectors.has(inner)) selectors.set(inner, (given) => scaled(inner(given)));
    return {...node, type: selectors.get(inner)};
  });
  function Matrices(given) {
    const tree = scaled(CircuitsVis.AttentionHeads(given));
    if (!found) throw new Error("this version of circuitsvis lays out its matrices in another way");
    return tree;
  }
  CircuitsVis.render(uid, Matrices, props);
}
