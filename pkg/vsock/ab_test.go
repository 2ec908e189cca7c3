package vsock_test
import ("testing";"time";"slices";"io";"fmt"
 "github.com/vmrt/vmrt/pkg/vsock"
"github.com/vmrt/vmrt/pkg/vsock/internal/exchange"
)
func TestAB(t *testing.T) {
	const V = 4
	var cs [V]io.ReadWriter
	for v := range V {
		vsock.Buf = []int{128<<10, 256<<10, 512<<10, 1<<20}[v]
		m := boot(t, "vhost-user")
		c := m.dial(t, exchange.Port)
		c.SetDeadline(time.Time{})
		cs[v] = c
	}
	var from [V][]float64
	buf := make([]byte, 256<<10)
	for round := range 160 {
		v := round % V
		c := cs[v]
		b := time.Now()
		exchange.Request(c, exchange.Give, bulk)
		for range bulk/len(buf) { io.ReadFull(c, buf) }
		from[v] = append(from[v], bulk/1e6/time.Since(b).Seconds())
	}
	for v := range V {
		slices.Sort(from[v])
		p := func(x []float64, q int) float64 { return x[(len(x)-1)*q/100] }
		fmt.Printf("variant %d: from p50 %.0f p90 %.0f max %.0f MB/s\n", v, p(from[v],50), p(from[v],90), p(from[v],100))
	}
}
